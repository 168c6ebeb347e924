"""Studies in a database: claimed under leases, reported on, ended, each change in one transaction."""
