"""Converts any source of images to record files, and verifies what was written.

`writer.py` has `write_store`, with an overview; `sources.py` opens what is converted; `verify.py`
has `verify_store`. They are exported by `pipeline`.
"""
