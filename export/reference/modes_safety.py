"""Fault modes of safety devices and material flow, and complaints that name a component but no symptom."""

from __future__ import annotations

from export.reference.rules import ALARM, FAILURE, Mode

# Word lists read as paragraphs; one word a line would hide the language behind the layout.
# fmt: off

SAFETY = (
    Mode(
        "guard_open", "safety", ("door",),
        np_en=("open contact", "guard not closed", "not locked", "open during operation", "interlock open",
               "opened", "lock not engaged", "open"),
        vp_en=("is open", "is not closed", "was opened", "is not locked", "stands open", "does not lock",
               "open contact"),
        np_de=("offen", "nicht geschlossen", "nicht verriegelt", "geöffnet", "Kontakt offen"),
        vp_de=("ist offen", "nicht geschlossen", "wurde geöffnet", "ist nicht verriegelt", "steht offen"),
        codes=("DOOR", "GRD", "SD-OPEN", "INTLK"), while_moving=True,
    ),
    Mode(
        "field_entered", "safety", ("curtain",),
        np_en=("beam interrupted", "protective field violated", "intrusion", "field broken", "person detected",
               "muting error", "body part in the field"),
        vp_en=("is interrupted", "was crossed", "detects a person", "is violated", "beam is broken",
               "protective field violated"),
        np_de=("unterbrochen", "Schutzfeld verletzt", "Eingriff erkannt", "Person erkannt", "Strahl unterbrochen"),
        vp_de=("ist unterbrochen", "wurde durchschritten", "meldet Eingriff", "Schutzfeld verletzt",
               "erkennt Person"),
        codes=("LC", "FIELD", "AOPD", "INTRUS"), while_moving=True,
    ),
    Mode(
        "estop_pressed", "safety", ("estop",),
        np_en=("actuated", "pressed", "button pushed", "activated by operator", "triggered", "actuation", "pushed"),
        vp_en=("was pressed", "is pressed", "was triggered", "has been actuated", "activated", "is latched"),
        np_de=("betätigt", "gedrückt", "ausgelöst", "Betätigung", "Auslösung"),
        vp_de=("wurde betätigt", "wurde gedrückt", "ausgelöst", "ist eingerastet", "betätigt"),
        codes=("EST", "NH", "ES-ACT"), implied=ALARM, halts=True,
    ),
    Mode(
        "bypassed", "safety", ("door", "curtain", "estop"),
        np_en=("bypassed", "manipulation", "tampering", "jumper wire found", "defeated", "taped over", "bridged",
               "bypass key active"),
        vp_en=("is bypassed", "has been defeated", "is bridged", "was tampered with", "is taped over",
               "has been jumpered", "is overridden by hand"),
        np_de=("überbrückt", "Manipulation", "manipuliert", "Brücke gefunden", "außer Kraft gesetzt"),
        vp_de=("ist überbrückt", "wurde manipuliert", "ist außer Kraft gesetzt", "ist gebrückt"),
        codes=("BYP", "TAMPER", "BRIDGE"), implied=FAILURE,
    ),
    Mode(
        "channel", "safety", ("door", "curtain", "estop"),
        np_en=("channel discrepancy", "two-channel fault", "discrepancy time exceeded", "cross fault",
               "safety relay error", "channels not equal", "OSSD fault"),
        vp_en=("channels disagree", "shows a discrepancy error", "channel 2 does not switch", "has a cross fault",
               "channels do not match"),
        np_de=("Diskrepanzfehler", "Zweikanalfehler", "Diskrepanzzeit überschritten", "Querschluss",
               "Sicherheitsrelais Fehler"),
        vp_de=("hat Diskrepanzfehler", "Kanal 2 schaltet nicht", "Kanäle ungleich", "hat Querschluss"),
        codes=("DISC", "2CH", "OSSD", "QS"), implied=ALARM,
    ),
    Mode(
        "fire", "safety", ("motor", "supply", "heater", "compressor", "bearing", "drive", "filter", "controller"),
        np_en=("smoke", "fire", "flames", "burning smell and smoke", "smoke detected", "fire alarm", "open flame"),
        vp_en=("is burning", "is on fire", "is smoking", "caught fire", "gives off smoke", "smokes"),
        np_de=("Rauch", "Brand", "Feuer", "Rauchentwicklung", "Flammen", "Brandgeruch und Rauch"),
        vp_de=("brennt", "raucht", "qualmt", "steht in Flammen", "hat Feuer gefangen"),
        codes=("SMK", "FIRE", "FD"), implied=FAILURE, anonymous=True,
    ),
    Mode(
        "gas", "safety", ("valve", "seal", "heater", "filter"),
        np_en=("gas leak", "gas alarm", "gas concentration", "ammonia smell", "solvent vapour", "CO concentration",
               "toxic gas", "acid leak"),
        vp_en=("leaks gas", "is leaking gas", "lets gas escape", "gas escapes", "leaks acid", "leaks solvent"),
        np_de=("Gasleck", "Gasalarm", "Gaskonzentration", "Gasaustritt", "Ammoniakgeruch", "Säureleck",
               "CO-Konzentration"),
        vp_de=("verliert Gas", "Gas tritt aus", "leckt Gas", "Säure tritt aus"),
        codes=("GAS", "CO", "LEL", "NH3"), shift=1, implied=ALARM, quantity=(("ppm", 10, 60), ("% LEL", 10, 20)),
        anonymous=True,
    ),
)

MATERIAL = (
    Mode(
        "material_low", "material", ("feeder",),
        np_en=("low material", "material low", "refill needed", "stock low", "nearly empty", "level low, material",
               "material shortage", "low fill level", "refill request", "running out"),
        vp_en=("is nearly empty", "needs refill", "is running out of material", "is low on material", "is almost empty",
               "needs material"),
        np_de=("Material niedrig", "fast leer", "Nachfüllen", "Materialmangel", "Füllstand Material niedrig",
               "Nachschub nötig"),
        vp_de=("ist fast leer", "braucht Material", "muss nachgefüllt werden", "Material geht aus",
               "hat wenig Material"),
        codes=("MAT-LO", "REFILL", "STOCK"), shift=-1, wear=True, direction=-1,
        quantity=(("kg", 20, 400), ("pcs", 50, 900), ("%", 10, 40)),
    ),
    Mode(
        "material_out", "material", ("feeder",),
        np_en=("empty", "no material", "material missing", "out of material", "no parts", "no blank", "end of roll"),
        vp_en=("is empty", "ran empty", "has no material", "is out of parts", "ran out of material",
               "delivers no parts"),
        np_de=("leer", "kein Material", "Material fehlt", "keine Teile", "Rollenende", "Material zu Ende"),
        vp_de=("ist leer", "hat kein Material", "leergelaufen", "ohne Material", "liefert keine Teile"),
        codes=("MAT-OUT", "EMPTY", "NOPART"), implied=ALARM, shift=-1,
    ),
    Mode(
        "material_jam", "material", ("feeder", "gripper", "belt"),
        np_en=("part jam", "product jam", "jammed parts", "material jam", "pile-up of parts", "bridging of material",
               "part stuck", "carton jam", "box stuck"),
        vp_en=("is jammed with parts", "has a part stuck", "is clogged with material", "backs up with product",
               "lost the workpiece", "is blocked by a part"),
        np_de=("Teilestau", "Materialstau", "Produktstau", "verklemmtes Teil", "Teil steckt", "Karton verklemmt"),
        vp_de=("hat Teilestau", "durch Teil blockiert", "ist mit Material verstopft", "Werkstück verloren",
               "staut Produkte"),
        codes=("PJAM", "PART", "STAU"), implied=1,
    ),
    Mode(
        "rejects", "material", ("tool", "feeder", "gripper", "heater"),
        np_en=("reject rate high", "scrap rate", "bad parts", "rejects", "quality deviation", "parts out of tolerance",
               "scrap", "surface defects on parts", "NOK parts", "dimension out of tolerance"),
        vp_en=("produces scrap", "produces bad parts", "makes rejects", "leaves marks on parts", "causes NOK parts",
               "parts out of tolerance"),
        np_de=("Ausschuss", "Ausschussrate hoch", "NIO-Teile", "Schlechtteile", "Maßabweichung",
               "Teile nicht in Toleranz",
               "Qualitätsabweichung"),
        vp_de=("produziert Ausschuss", "macht Schlechtteile", "verursacht NIO-Teile", "Teile nicht maßhaltig"),
        codes=("QA", "REJ", "SCRAP", "NIO"), quantity=(("% rej", 2, 8), ("ppm rej", 200, 900), ("NOK/h", 5, 40)),
        anonymous=True,
    ),
)

_COMPLAINTS_EN = ("fault", "problem", "error", "malfunction", "trouble", "issue", "fault message", "disturbance",
                  "abnormal behaviour", "not ok", "general fault", "collective fault")
_COMPLAINTS_VP_EN = ("makes trouble", "has a problem", "is not ok", "reports a fault", "behaves strangely",
                     "has an issue", "does not work properly", "is faulty", "malfunctions")
_COMPLAINTS_DE = ("Fehler", "Problem", "Fehlermeldung", "Störmeldung", "Sammelstörung", "nicht i.O.", "Auffälligkeit")
_COMPLAINTS_VP_DE = ("meldet Fehler", "macht Probleme", "nicht i.O.", "funktioniert nicht richtig", "spinnt",
                     "hat ein Problem", "verhält sich komisch")

HOME_CATEGORY = {
    "bearing": "mechanical", "gearbox": "mechanical", "belt": "mechanical", "spindle": "mechanical",
    "tool": "mechanical", "gripper": "mechanical", "motor": "electrical", "drive": "electrical",
    "supply": "electrical", "heater": "thermal", "fan": "thermal", "coolant": "thermal", "pump": "hydraulic",
    "compressor": "pneumatic", "controller": "control", "sensor": "control", "switch": "network",
    "feeder": "material",
}
"""Where a complaint without a symptom belongs. Seals, valves and filters have no home: their medium decides."""

COMPLAINTS = tuple(
    Mode(f"complaint_{category}", category, tuple(c for c, home in HOME_CATEGORY.items() if home == category),
         _COMPLAINTS_EN, _COMPLAINTS_VP_EN, _COMPLAINTS_DE, _COMPLAINTS_VP_DE)
    for category in dict.fromkeys(HOME_CATEGORY.values())
)
