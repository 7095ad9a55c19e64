"""From records of runs to a table: comparison (pure functions) | tables (four text formats)."""
