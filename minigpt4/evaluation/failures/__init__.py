"""How often answers fail: rules, a judge, a person, and the report."""
