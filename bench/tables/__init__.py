"""One module per table; its `TABLE` is the table."""
