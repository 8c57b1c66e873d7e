"""``python -m benchmarks.leaderboard``."""

from benchmarks.leaderboard.cli import app

if __name__ == "__main__":
    app()
