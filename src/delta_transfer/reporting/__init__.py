"""Records of runs -> comparison, statistics and selection (pure functions) -> tables, figures, a page."""
