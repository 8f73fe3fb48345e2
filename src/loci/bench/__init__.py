"""The yardstick: what is recalled, per byte held and per millisecond spent. A task is one module behind `task.Task`."""
