"""From limits or a recipe to a package."""
