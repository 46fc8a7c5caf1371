"""Typed schemas of the YAML sections: the one place where an option has a type, a range and a default."""
