"""What training needs: optimizers, trainers' hooks, statistics."""
