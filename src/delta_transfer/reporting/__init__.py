"""From records of runs to a table: comparison, selection (pure functions) | tables (four text formats)."""
