"""The bundle: the directory that the exporter hands to the runtime. This package neither exports nor runs anything."""
