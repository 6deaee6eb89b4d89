"""Named protocols and the numbers they give. Never trains."""
