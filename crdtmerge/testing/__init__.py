"""What others use to test with: small real networks on real data, and simulated networks of peers."""
