"""Plans: which method every step, layer and head runs, as a file; read, written, explained and drawn."""
