"""The verb `bench`: a file for each measurement, `verb` chooses; `page` and `step_page` print."""
