"""Turn trials into the answer: the response, its interval, warnings, confirmation. Knows no database and no screen."""
