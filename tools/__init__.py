"""Development of maskops: its environment, its checks, its packages. Never installed."""
