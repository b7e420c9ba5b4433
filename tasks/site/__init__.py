"""What the documentation site needs beside Sphinx; `docs/conf.py` loads these modules as extensions."""
