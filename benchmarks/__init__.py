"""What relaymux costs, beside what one would use instead.  See docs/performance.md."""
