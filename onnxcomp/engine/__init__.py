"""From a recipe to a published result: catalogue, recipes, the pass manager, jobs."""
