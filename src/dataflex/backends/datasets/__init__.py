"""Data sets: from the names in a YAML file to tokenised rows.

`find_datasets` looks at the head of every file and reports all problems before anything heavy is loaded; `encode_sft` and `encode_text` read all.
"""
