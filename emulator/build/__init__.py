"""The build: from limits or a recipe to a package."""
