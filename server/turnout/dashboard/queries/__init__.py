"""What the API's documents are made of: SQL over the run store."""
