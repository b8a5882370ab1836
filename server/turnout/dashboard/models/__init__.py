"""The documents that the dashboard's API answers with."""
