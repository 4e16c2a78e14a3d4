"""Package data: `manifest.json`, every known checkpoint, and small weights whose licence allows shipping."""
