"""The files of a finished run: data, page, plots, model card, intervals."""
