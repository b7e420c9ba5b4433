"""The registry: installed plugins, and the quantizer classes they register."""
