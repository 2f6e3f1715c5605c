"""Everything that comes in files: weights and vocabularies, from a folder or from the hub.

No lesson needs this wing: `llm.py` calls it. A file imports only files above it.

    untrusted      open files from strangers, checked before they are read
    weight_files   the tensors of a checkpoint, one by one
    hub            from a model's name to a folder on disk
    load           from a folder to a `GPT`: names, transposes, refusals
    tokenizer      text to token ids and back
    train_tiny     the program that trained the included model
"""
