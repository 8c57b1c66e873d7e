"""What builds the site, besides MkDocs."""
