"""Pictures: charts, the report page, and what patterns look like."""
