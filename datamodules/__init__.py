"""One task a file over one shared base."""
