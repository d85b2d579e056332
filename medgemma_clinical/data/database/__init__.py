"""Reading large clinical tables with DuckDB, and writing the DKA file made of them."""
