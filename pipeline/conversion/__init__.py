"""Any source of images -> record files: reading sources, writing shards, and verifying what was written."""
