"""Co-design: simulate a model's steps on a chip, and compare modelled with measured kernel times."""
