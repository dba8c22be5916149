"""Opening, normalising and sizing a model: everything before anybody thinks about channels."""
