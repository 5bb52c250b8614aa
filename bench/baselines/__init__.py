"""What ShadowKV is compared with: other ways to spend the same number of attended tokens, and full caches."""
