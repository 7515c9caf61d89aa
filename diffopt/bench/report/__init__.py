"""What is told of records: tables, claims, plots, the page, README."""
