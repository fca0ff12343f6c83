"""Who shares what with whom, and the vocabulary-parallel losses."""
