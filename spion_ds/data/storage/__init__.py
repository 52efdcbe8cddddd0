"""How data are kept: caches, archives, the files of others."""
