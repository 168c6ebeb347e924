"""What a study is made of, as plain frozen records."""
