"""Reports of results: one argument, shown as a page, in a terminal, or as Markdown, JSON and CSV."""
