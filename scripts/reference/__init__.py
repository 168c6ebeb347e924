"""The pages of docs/reference/: templates in `pages/`, and the tables that are made from the code for them."""
