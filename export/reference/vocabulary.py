"""Names of machines and components, in the words of English and German shop floors."""

from __future__ import annotations

from typing import Literal

# Word lists read as paragraphs; one word a line would hide the language behind the layout.
# fmt: off

Split = Literal["train", "validation", "test"]

COMPONENT_NOUNS_EN: dict[str, tuple[str, ...]] = {
    "bearing": ("bearing", "roller bearing", "ball bearing", "main bearing", "brg", "shaft bearing", "motor bearing",
                "pump bearing", "bearings", "DE bearing", "NDE bearing", "fan bearing"),
    "gearbox": ("gearbox", "gear box", "gear unit", "reducer", "gear", "planetary gear", "transmission", "gbx"),
    "belt": ("belt", "drive belt", "timing belt", "v-belt", "toothed belt", "conveyor belt", "transport belt"),
    "spindle": ("spindle", "main spindle", "work spindle", "milling spindle", "spdl", "tool spindle"),
    "tool": ("tool", "cutter", "end mill", "drill", "punch", "die", "cutting insert", "saw blade", "knife", "T12",
             "drill bit"),
    "gripper": ("gripper", "vacuum gripper", "suction cup", "suction cups", "grip finger", "EOAT", "end effector",
                "gripper jaw"),
    "motor": ("motor", "main motor", "servo motor", "drive motor", "mtr", "pump motor", "fan motor", "axis motor",
              "spindle motor", "feed motor"),
    "drive": ("drive", "frequency converter", "VFD", "inverter", "servo drive", "servo amplifier", "axis drive",
              "converter", "soft starter", "servo controller"),
    "supply": ("power supply", "24V supply", "psu", "UPS", "mains supply", "supply voltage", "fuse", "circuit breaker",
               "mains feed", "UPS battery", "transformer", "power feed"),
    "heater": ("heater", "heating element", "heating zone", "heating cartridge", "heater band", "burner",
               "heating rod", "zone 3 heater"),
    "fan": ("fan", "cooling fan", "blower", "ventilator", "exhaust fan", "cabinet fan", "circulation fan"),
    "coolant": ("coolant", "cooling water", "cooling circuit", "chilled water", "cooling lubricant", "cooling loop",
                "cutting fluid", "coolant circuit"),
    "pump": ("pump", "feed pump", "hydraulic pump", "circulation pump", "oil pump", "booster pump", "gear pump",
             "pmp"),
    "seal": ("seal", "shaft seal", "gasket", "o-ring", "hose", "sealing ring", "hose fitting", "pipe joint",
             "cylinder seal"),
    "filter": ("filter", "return filter", "filter element", "filter cartridge", "inlet filter", "suction filter",
               "strainer", "filter insert"),
    "valve": ("valve", "solenoid valve", "proportional valve", "relief valve", "check valve", "control valve",
              "vlv", "valve block", "shut-off valve"),
    "compressor": ("compressor", "screw compressor", "compressor stage", "compressor unit", "air compressor",
                   "piston compressor", "compr"),
    "controller": ("PLC", "controller", "CPU", "control unit", "plc cpu", "IPC", "HMI panel", "industrial pc", "CNC",
                   "robot controller"),
    "sensor": ("sensor", "encoder", "thermocouple", "proximity switch", "transmitter", "photo eye", "light barrier",
               "pt100", "probe", "limit switch", "resolver", "load cell", "level probe"),
    "switch": ("switch port", "ethernet switch", "network switch", "router", "access point", "gateway", "wifi link",
               "uplink", "fieldbus coupler", "managed switch"),
    "door": ("guard door", "safety door", "safety gate", "access gate", "protective door", "guard", "interlock",
             "safety hatch", "service door"),
    "estop": ("emergency stop", "e-stop", "estop", "emergency-stop button", "E-STOP button", "em-stop",
              "emergency stop circuit", "e-stop chain"),
    "curtain": ("light curtain", "safety light curtain", "laser scanner", "area scanner", "safety scanner",
                "safety mat", "light grid"),
    "feeder": ("feeder", "hopper", "magazine", "infeed", "vibratory feeder", "screw feeder", "bowl feeder",
               "material hopper", "label roll", "film roll", "bar feeder"),
}

COMPONENT_NOUNS_DE: dict[str, tuple[str, ...]] = {
    "bearing": ("Lager", "Wälzlager", "Kugellager", "Hauptlager", "Motorlager", "Wellenlager", "Festlager",
                "Pumpenlager", "Lagerung"),
    "gearbox": ("Getriebe", "Planetengetriebe", "Getriebestufe", "Untersetzung", "Winkelgetriebe", "Hauptgetriebe"),
    "belt": ("Riemen", "Keilriemen", "Zahnriemen", "Antriebsriemen", "Förderband", "Transportband", "Fördergurt"),
    "spindle": ("Spindel", "Hauptspindel", "Frässpindel", "Arbeitsspindel", "Werkzeugspindel"),
    "tool": ("Werkzeug", "Fräser", "Bohrer", "Stempel", "Schneidplatte", "Messer", "Sägeblatt", "Matrize"),
    "gripper": ("Greifer", "Sauggreifer", "Sauger", "Vakuumgreifer", "Greiffinger", "Greiferbacke"),
    "motor": ("Motor", "Hauptmotor", "Servomotor", "Antriebsmotor", "Pumpenmotor", "Lüftermotor", "Achsmotor",
              "Spindelmotor"),
    "drive": ("Umrichter", "Frequenzumrichter", "FU", "Servoregler", "Servoverstärker", "Antriebsregler",
              "Achsregler", "Sanftanlauf"),
    "supply": ("Netzteil", "24V-Versorgung", "Spannungsversorgung", "Einspeisung", "USV", "Sicherung",
               "Leitungsschutzschalter", "Netzspannung", "USV-Batterie", "Trafo"),
    "heater": ("Heizung", "Heizelement", "Heizzone", "Heizpatrone", "Heizband", "Brenner", "Heizstab"),
    "fan": ("Lüfter", "Kühllüfter", "Gebläse", "Ventilator", "Schaltschranklüfter", "Umluftventilator"),
    "coolant": ("Kühlmittel", "Kühlwasser", "Kühlkreislauf", "Kühlschmierstoff", "KSS", "Kühlung"),
    "pump": ("Pumpe", "Förderpumpe", "Hydraulikpumpe", "Umwälzpumpe", "Ölpumpe", "Zahnradpumpe"),
    "seal": ("Dichtung", "Wellendichtring", "O-Ring", "Schlauch", "Zylinderdichtung", "Verschraubung",
             "Schlauchanschluss"),
    "filter": ("Filter", "Rücklauffilter", "Filterelement", "Filterpatrone", "Ansaugfilter", "Saugfilter", "Sieb"),
    "valve": ("Ventil", "Magnetventil", "Proportionalventil", "Rückschlagventil", "Regelventil", "Ventilblock",
              "Absperrventil", "Überdruckventil"),
    "compressor": ("Kompressor", "Schraubenkompressor", "Verdichter", "Kolbenverdichter", "Verdichterstufe",
                   "Druckluftkompressor"),
    "controller": ("SPS", "Steuerung", "SPS-CPU", "Bedienpanel", "CNC-Steuerung", "Robotersteuerung", "Industrie-PC",
                   "Zentralbaugruppe"),
    "sensor": ("Sensor", "Drehgeber", "Geber", "Thermoelement", "Endschalter", "Initiator", "Messumformer", "Fühler",
               "Lichttaster", "Wägezelle", "Näherungsschalter", "Füllstandssonde"),
    "switch": ("Netzwerk-Switch", "Switchport", "Router", "WLAN-Strecke", "Feldbuskoppler", "Gateway", "Netzwerkport",
               "Access Point"),
    "door": ("Schutztür", "Sicherheitstür", "Schutzgitter", "Schutzhaube", "Zugangstür", "Türverriegelung"),
    "estop": ("Not-Halt", "Not-Aus", "NOT-HALT-Taster", "Not-Aus-Kreis", "Nothalt", "Not-Aus-Taster"),
    "curtain": ("Lichtvorhang", "Lichtgitter", "Laserscanner", "Flächenscanner", "Trittmatte", "Sicherheitsscanner"),
    "feeder": ("Zuführung", "Trichter", "Magazin", "Vibrationsförderer", "Materialtrichter", "Dosierschnecke",
               "Etikettenrolle", "Folienrolle", "Stangenlader"),
}

PLACES_EN = ("axis {d}", "station {d}", "drive end", "left side", "right side", "line {d}", "cell {d}", "zone {d}",
             "unit {d}", "upper", "rear", "main", "infeed side", "outfeed", "spare", "circuit {d}", "no. {d}")
PLACES_DE = ("Achse {d}", "Station {d}", "A-Seite", "links", "rechts", "Linie {d}", "Zelle {d}", "Zone {d}", "oben",
             "hinten", "Einlauf", "Auslauf", "Kreis {d}", "Nr. {d}", "Antriebsseite")

MACHINE_TYPES: dict[Split, tuple[str, ...]] = {
    "train": ("press", "mill", "lathe", "robot", "oven", "furnace", "pump", "conveyor", "compressor", "packer", "crane",
              "chiller", "plc", "switch", "agv", "mixer", "molder", "welder", "grinder", "palletizer", "fan", "saw",
              "cnc", "boiler", "filler", "labeler", "cabinet", "tester", "Presse", "Fräse", "Ofen", "Pumpe", "Roboter",
              "Förderer", "Verpackung", "Kran", "Kessel", "Spritzguss", "Schweisszelle", "Drehmaschine", "Abfüller",
              "line", "cell", "station", "stamping", "assembly", "kiln", "washer", "shredder", "hoist", "cutter"),
    "validation": ("bender", "stacker", "Schleifmaschine"),
    "test": ("extruder", "laser", "centrifuge", "dryer", "capper", "Walzwerk", "Säge", "Trockner", "shrinkwrap",
             "loom"),
}

MACHINE_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("{t}-{d2}", "{t}{d}", "{T} {d}", "{T}_{d2}", "L{d}-{t}-{d}", "{t}/{d}", "hall{d}.{t}{d}", "{t} #{d}",
              "{T}{d2}", "line {d} {t}", "M{d2}", "A{d3}", "{t} {C}", "{C}{d}-{T}"),
    "validation": ("{t}.{d2}", "{C}{d}/{t}", "{T}-{C}"),
    "test": ("plant{d}_{t}_{d2}", "={d2}+{T}", "{t}:{d3}", "{d}.{d}-{t}", "W{d}/{T}{d2}"),
}

STATES: dict[str, tuple[str, ...]] = {
    "running": ("running", "run", "RUN", "auto", "AUTO", "Automatik", "Betrieb", "production", "in operation", "active",
                "cycle", "läuft"),
    "halted": ("stopped", "STOP", "halted", "Stillstand", "off", "aus", "fault", "FAULT", "tripped", "idle", "standby",
               "Halt", "gestoppt", "IDLE", "setup", "Einrichten", "paused", "steht"),
    "maintenance": ("maintenance", "MAINT", "Wartung", "service", "LOTO", "in Wartung", "Instandhaltung"),
    "test": ("test", "TEST", "commissioning", "simulation", "Inbetriebnahme", "Testbetrieb", "dry run", "SIM"),
}
