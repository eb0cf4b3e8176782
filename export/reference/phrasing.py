"""Sentence templates and cue words. Test templates are never used in training (see docs/reference-model.md).

Slots: ``{c}`` component, ``{np}`` noun phrase, ``{vp}`` predicate, ``{m}`` machine type, ``{d}`` digit, ``{v}`` value.
"""

from __future__ import annotations

from typing import Literal

from export.reference.vocabulary import Split

# Word lists read as paragraphs; one word a line would hide the language behind the layout.
# fmt: off

Language = Literal["en", "de"]

NP_TEMPLATES: dict[Language, dict[Split, tuple[str, ...]]] = {
    "en": {
        "train": (
            "{np} on {c}", "{np} at {c}", "{c}: {np}", "{c} {np}", "{np} detected at the {c}", "{c} - {np}", "{np} {c}",
            "{np} reported for {c}", "we see {np} on the {c}", "operator reports {np} at {c}", "{np} ({c})",
            "{c} shows {np}", "monitoring found {np}, source {c}", "{np}; part: {c}", "fault {c}, {np}",
            "{c} has {np}", "check {c}, {np}", "there is {np} at the {c}", "{np} from {c}", "{np} measured on {c}",
            "{c} > {np}", "[{c}] {np}", "{np} @ {c}", "{c} of {m}: {np}", "{np} of the {c} in hall {d}",
            "message from {c}: {np}", "{np} seen, {c} concerned", "{c} signals {np} since start of shift",
            "please look at the {c} because of {np}", "during production {np} appeared on the {c}",
            "{c} event. type: {np}", "inspection round: {c} with {np}", "{np}, cause unclear, place {c}",
            "we have {np} here, {c}", "{c} / {np} / see manual", "{np} | {c}",
            "line operator called: {np} on our {c}", "at the {c} of the {m} {np}", "diagnostics {c} = {np}",
            "sub {c} stat {np}", "quick note, {c}: {np}, thanks", "{np} in the area of the {c}",
            "the display says {np}, it is the {c}", "{c} monitoring responded ({np})", "automatic report {c} {np} {v}",
        ),
        "validation": (
            "{np} noticed around {c}", "ticket: {c}, symptom {np}", "{c} alarm list entry: {np}",
            "our {c} has got {np} now", "visual check gives {np} for {c}",
        ),
        "test": (
            "{np} was picked up by diagnostics near {c}", "can someone look at {c}? {np}",
            "diagnosis points to {c} ({np})", "component = {c} / symptom = {np}", "{np} traced to {c}",
            "first finding: {np}. affected: {c}", "{c}!! {np}", "the tablet shows {np} under {c}",
            "entry {d}{d}: {c} -> {np}", "hello, {np} with the {c} here at the {m}", "asset {c}, observation {np}",
            "for the {c} the system lists {np}",
        ),
    },
    "de": {
        "train": (
            "{np} an {c}", "{np} am {c}", "{c}: {np}", "{c} {np}", "{np} bei {c} erkannt", "{c} - {np}", "{np} {c}",
            "{np} gemeldet, {c}", "Bediener meldet {np} an {c}", "{np} ({c})", "{c} zeigt {np}", "Meldung {c}: {np}",
            "{np}; Bauteil {c}", "Fehler {c}, {np}", "{c} mit {np}", "bitte {c} prüfen, {np}", "es gibt {np} am {c}",
            "{np} gemessen an {c}", "{c} von {m}: {np}", "Überwachung {c} angesprochen ({np})", "[{c}] {np}",
            "wir haben {np} an {c}", "{np} im Bereich {c}", "{c} / {np} / siehe Handbuch", "{np} | {c}",
            "Rundgang: {c} mit {np}", "seit Schichtbeginn {np} an {c}", "im Betrieb {np} am {c} aufgetreten",
            "Anzeige sagt {np}, betrifft {c}", "automatische Meldung {c} {np} {v}", "Diagnose {c} = {np}",
            "Anruf von der Linie: {np} an {c}", "an {c} der {m} {np}", "{np}, Ort {c}, Ursache unklar",
        ),
        "validation": ("{np} aufgefallen bei {c}", "Ticket: {c}, Symptom {np}", "unser {c} hat jetzt {np}"),
        "test": (
            "laut Diagnose {np}, betroffen {c}", "kann jemand nach {c} schauen? {np}", "Bauteil = {c} / Befund = {np}",
            "{c}!! {np}", "Tablet zeigt {np} unter {c}", "hallo, {np} mit {c} hier an {m}",
            "Eintrag {d}{d}: {c} -> {np}",
            "für {c} führt das System {np} auf",
        ),
    },
}

VP_TEMPLATES: dict[Language, dict[Split, tuple[str, ...]]] = {
    "en": {
        "train": (
            "{c} {vp}", "the {c} {vp}", "looks like the {c} {vp}", "shift lead says {c} {vp}", "attention, {c} {vp}",
            "since shift start the {c} {vp}", "our {c} {vp}", "{c} on {m} {vp}", "seems {c} {vp}", "{c} {vp} here",
            "operator: {c} {vp}", "we noticed that {c} {vp}", "{vp}: {c}", "{c}, it {vp}", "hall {d}: the {c} {vp}",
            "note: {c} {vp} when running", "the {c} of the {m} {vp}", "{c} {vp}, please have a look",
            "the system says that {c} {vp}", "status {c}: {vp}", "I think the {c} {vp}", "message: {c} {vp} ({v})",
            "while producing the {c} {vp}", "{c} on station {d} {vp}", "colleague reports the {c} {vp}",
            "it was found that the {c} {vp}", "checked it, {c} {vp}", "hi, {c} {vp}, thanks", "{c} ... {vp}",
        ),
        "validation": (
            "somebody said the {c} {vp}", "on arrival the {c} {vp}", "{m} report: the {c} {vp} at the moment",
        ),
        "test": (
            "according to the night crew, {c} {vp}", "the crew noticed today: {c} {vp}", "report no. {d}{d}: {c} {vp}",
            "as far as I can tell the {c} {vp}", "hey team, that {c} {vp}", "observed this morning, {c} {vp}",
            "for your information: our {m}'s {c} {vp}", "summary -> {c} {vp}",
        ),
    },
    "de": {
        "train": (
            "{c} {vp}", "die {c} {vp}", "der {c} {vp}", "Schichtleiter sagt {c} {vp}", "Achtung, {c} {vp}",
            "seit Schichtbeginn: {c} {vp}", "unser {c} {vp}", "{c} an {m} {vp}", "anscheinend {c} {vp}",
            "Bediener: {c} {vp}", "Halle {d}: {c} {vp}", "Hinweis vom Werker: {c} {vp}", "{c} {vp}, bitte ansehen",
            "Status {c}: {vp}", "ich glaube {c} {vp}", "Meldung: {c} {vp} ({v})", "im Betrieb {c} {vp}",
            "{c} Station {d} {vp}", "Kollege meldet {c} {vp}", "habe gesehen, {c} {vp}", "{c} ... {vp}",
        ),
        "validation": ("jemand sagte {c} {vp}", "beim Eintreffen: {c} {vp}"),
        "test": (
            "laut Nachtschicht: {c} {vp}", "heute früh aufgefallen, {c} {vp}", "Bericht Nr. {d}{d}: {c} {vp}",
            "soweit ich sehe {c} {vp}", "hallo Team, {c} {vp}",
        ),
    },
}

BARE_TEMPLATES: dict[Language, dict[Split, tuple[str, ...]]] = {
    "en": {
        "train": ("{np}", "{np} detected", "{m}: {np}", "alarm list: {np}", "there is {np} somewhere", "operator: {np}",
                  "{np}, source not known", "machine reports {np}", "{np} in hall {d}", "we have {np}",
                  "{np} on the {m}", "message {d}{d}: {np}", "{np} {v}"),
        "validation": ("{np} noticed", "ticket: {np}"),
        "test": ("diagnostics picked up {np}", "{np}, origin unclear", "the tablet shows {np}", "entry {d}: {np}"),
    },
    "de": {
        "train": ("{np}", "{np} erkannt", "{m}: {np}", "Meldeliste: {np}", "irgendwo {np}", "Bediener: {np}",
                  "{np}, Quelle unbekannt", "Maschine meldet {np}", "{np} in Halle {d}", "wir haben {np}"),
        "validation": ("{np} aufgefallen",),
        "test": ("laut Diagnose {np}", "{np}, Herkunft unklar", "Tablet zeigt {np}"),
    },
}

VAGUE: dict[Language, dict[Split, tuple[str, ...]]] = {
    "en": {
        "train": ("something is wrong", "machine not ok", "please check", "alarm", "fault", "error {d}{d}{d}{d}",
                  "unknown error", "it does not work", "message {d}{d}{d}", "strange behaviour", "???", "see photo",
                  "call me back", "group alarm", "status word 0x{d}{d}F{d}", "problem at the {m}", "same as last time",
                  "help needed at {m}", "general alarm {m}", "event {d}{d}", "no description", "n/a", "-",
                  "what is this",
                  "the {m} does not run right", "operator pressed call button", "lamp is on", "bit {d} set"),
        "validation": ("something odd here", "undefined event {d}{d}"),
        "test": ("can't say what it is", "the {m} acts up", "not sure, please come", "fault number {d}{d}{d}",
                 "text missing", "it is doing it, you know", "unspecified alarm"),
    },
    "de": {
        "train": ("irgendwas stimmt nicht", "Maschine nicht i.O.", "bitte prüfen", "Alarm", "Störung allgemein",
                  "Fehler {d}{d}{d}{d}", "unbekannter Fehler", "geht nicht", "Meldung {d}{d}{d}", "komisches Verhalten",
                  "siehe Foto", "bitte Rückruf", "Sammelmeldung", "Problem an {m}", "wie letztes Mal", "Hilfe an {m}",
                  "kein Text", "Lampe leuchtet", "{m} läuft nicht richtig"),
        "validation": ("hier stimmt was nicht",),
        "test": ("kann nicht sagen was es ist", "{m} zickt", "bin unsicher, bitte kommen", "Text fehlt"),
    },
}

# One list per band: notice, warning, alarm, failure.
STAGES: dict[Language, tuple[tuple[str, ...], ...]] = {
    "en": (
        ("slightly", "minor", "early sign", "trend rising slowly", "slight", "a little", "just beginning", "barely",
         "INFO", "notice", "advisory", "very small", "hint", "starting to show", "mild", "low priority"),
        ("warning", "WARN", "pre-alarm", "prewarning", "moderate", "WARNING", "above warning threshold", "noticeable",
         "warn level", "medium", "prio 2", "caution"),
        ("ALARM HIGH", "severe", "strong", "urgent", "major", "alarm level 2", "heavy", "HIGH ALARM", "serious",
         "badly", "high priority", "very strong", "second limit exceeded"),
        ("CRITICAL", "critical", "extreme", "total failure", "breakdown", "trip limit exceeded", "catastrophic",
         "emergency level", "beyond all limits", "FATAL", "imminent destruction", "danger level"),
    ),
    "de": (
        ("leicht", "geringfügig", "erstes Anzeichen", "Tendenz steigend", "ein wenig", "minimal", "HINWEIS", "Info",
         "beginnend", "kaum merklich", "schwach ausgeprägt", "niedrige Prio"),
        ("Warnung", "WARNUNG", "Vorwarnung", "mäßig", "Voralarm", "Warnschwelle überschritten", "merklich",
         "Warnstufe", "mittel", "Prio 2"),
        ("stark", "schwer", "dringend", "erheblich", "HAUPTALARM", "massiv", "Alarmstufe 2", "heftig", "ernst",
         "hohe Prio", "sehr stark", "zweite Grenze überschritten"),
        ("KRITISCH", "kritisch", "extrem", "Totalausfall", "Abschaltgrenze überschritten", "katastrophal",
         "Notfallstufe", "FATAL", "Zerstörung droht", "Gefahrstufe", "jenseits aller Grenzen"),
    ),
}

REPEATS: dict[Language, dict[bool, tuple[str, ...]]] = {
    "en": {
        True: ("again and again", "for hours", "repeatedly", "since yesterday", "keeps coming back",
               "every few minutes",
               "recurring", "for {d} h now", "all day", "many times today", "for {d} days", "permanently",
               "over and over", "constantly"),
        False: ("once", "first time", "for {d} s", "only once", "for a moment", "single event", "just now",
                "a minute ago", "new"),
    },
    "de": {
        True: ("immer wieder", "seit Stunden", "wiederholt", "seit gestern", "kommt ständig", "alle paar Minuten",
               "wiederkehrend", "seit {d} h", "den ganzen Tag", "mehrfach heute", "seit {d} Tagen", "dauerhaft",
               "andauernd"),
        False: ("einmalig", "erstmals", "für {d} s", "nur einmal", "kurz", "gerade eben", "vor einer Minute", "neu"),
    },
}

HALTS: dict[Language, tuple[str, ...]] = {
    "en": ("machine stopped", "line is down", "machine stands still", "production halted", "already switched off",
           "unit shut down", "machine is off", "we stopped it", "drive tripped and stopped", "not running"),
    "de": ("Maschine steht", "Anlage steht", "Produktion gestoppt", "bereits abgeschaltet", "Linie steht",
           "Maschine ist aus", "haben gestoppt", "Stillstand", "läuft nicht mehr"),
}

QUALIFIERS: dict[str, dict[Language, dict[Split, tuple[str, ...]]]] = {
    "test": {
        "en": {"train": ("TEST", "this is a test", "test alarm", "only a test", "drill", "simulated", "function test",
                         "during commissioning", "test message, ignore", "simulation", "test run of the alarm chain",
                         "sent for test", "monthly alarm test", "training drill", "dummy alarm"),
               "validation": ("announced test", "part of a drill"),
               "test": ("planned test of the alarm", "just testing the message", "simulated on purpose",
                        "drill in progress")},
        "de": {"train": ("TEST", "nur ein Test", "Testalarm", "Probealarm", "Übung", "simuliert", "Funktionstest",
                         "während Inbetriebnahme", "Testmeldung", "Simulation", "zu Testzwecken"),
               "validation": ("angekündigter Test",),
               "test": ("geplanter Test der Meldung", "Übung läuft", "bewusst simuliert")},
    },
    "maintenance": {
        "en": {"train": ("during maintenance", "maintenance in progress", "under service", "locked out for repair",
                         "LOTO active", "planned maintenance", "technician working on it", "service mode",
                         "maintenance window", "being serviced", "while mechanics repair it"),
               "validation": ("service technician on site, maintenance",),
               "test": ("scheduled maintenance is running", "machine handed over to service", "LOTO, repair ongoing")},
        "de": {"train": ("während Wartung", "Wartung läuft", "in Wartung", "Instandhaltung arbeitet daran",
                         "Wartungsmodus", "geplante Wartung", "Reparatur läuft", "für Reparatur gesperrt",
                         "Servicetechniker dran"),
               "validation": ("Techniker vor Ort, Wartung",),
               "test": ("Maschine an Instandhaltung übergeben", "turnusmäßige Wartung läuft")},
    },
    "cleared": {
        "en": {"train": ("cleared", "back to normal", "resolved", "gone again", "ok again", "alarm cleared",
                         "fault reset, running fine", "returned to normal", "no longer present", "fixed",
                         "CLR", "problem solved", "has disappeared", "message went away"),
               "validation": ("alarm went away, all normal again",),
               "test": ("meanwhile resolved", "has returned to normal by itself", "alarm gone, all fine now",
                        "was fixed already")},
        "de": {"train": ("behoben", "wieder normal", "gegangen", "wieder i.O.", "Störung weg", "Alarm gegangen",
                         "erledigt", "nicht mehr vorhanden", "wieder in Ordnung", "beseitigt", "zurückgesetzt, läuft"),
               "validation": ("inzwischen wieder normal",),
               "test": ("inzwischen behoben", "hat sich erledigt", "Meldung wieder weg")},
    },
}

NOMINAL: dict[Language, dict[Split, tuple[str, ...]]] = {
    "en": {"train": ("routine check {c}: no {np}", "no {np} on {c}", "{c} checked, no {np} found", "{c} ok, no {np}",
                     "inspection done, {c} without {np}", "no sign of {np} at {c}", "{c} fine, {np} not found"),
           "validation": ("checked the {c}, no {np}",),
           "test": ("round finished: no {np} at the {c}", "looked at {c}: no {np}, all good")},
    "de": {"train": ("Rundgang {c}: keine {np}", "kein {np} an {c}", "{c} geprüft, kein {np}", "{c} i.O., keine {np}",
                     "Prüfung fertig, {c} ohne {np}", "keine Spur von {np} an {c}"),
           "validation": ("{c} kontrolliert, keine {np}",),
           "test": ("Runde beendet: kein {np} an {c}", "{c} angesehen: keine {np}, alles gut")},
}
