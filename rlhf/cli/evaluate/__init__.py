"""The verb `evaluate`: `ahead` and `rules` judge what is asked before anything runs, `verb` measures, `page` shows."""
