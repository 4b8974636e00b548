"""The Python API: what `mergekit_vl` exports beside classes of its rooms. Commands and API call the same functions."""
