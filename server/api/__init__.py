"""HTTP: schemas, routes and errors. Nothing here computes."""
