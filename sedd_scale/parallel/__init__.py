"""Process layout, vocabulary-parallel operations and the DeepSpeed engines."""
