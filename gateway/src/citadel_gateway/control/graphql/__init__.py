"""GraphQL: the same things as REST, with the same rights, in one question."""
