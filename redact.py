"""Cuts personal data and keys out of a text, before it touches the disk.

    from redact import redact
    redact("Call 650-253-0000 or write to ann@example.com")  # ("Call [PHONE] or write to [EMAIL]", 2)

Cut are e-mail addresses, phone and card numbers, IBANs, IP addresses, API keys, and passwords that are called so, in
their usual spelling. Not found: numbers in words; "ann at example dot com"; ten digits in a row; local numbers of other
countries, if no word such as "call" stands before them or they have eight digits that are not in pairs; passwords
without a digit or sign; cards next to a comma and a digit; account numbers of other kinds; of a JSON web token a first
part of more than 4,096 characters.
"""

import functools
import ipaddress
import re

from config import need

# full-width characters (ann＠example.com), spaces and hyphens that do not break -> plain ones
WIDE = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0xA0: " ", 0x202F: " ", 0x2011: "-"}
REGION = "US"  # whose phone numbers are known without a country code

SECRETS = """aws.AWSKeyDetector azure_storage_key.AzureStorageKeyDetector basic_auth.BasicAuthDetector
discord.DiscordBotTokenDetector github_token.GitHubTokenDetector gitlab_token.GitLabTokenDetector
mailchimp.MailchimpDetector pypi_token.PypiTokenDetector sendgrid.SendGridDetector slack.SlackDetector
square_oauth.SquareOAuthDetector stripe.StripeDetector telegram_token.TelegramBotTokenDetector
twilio.TwilioKeyDetector""".split()  # of detect-secrets: those that take linear time and fire on no plain text
MORE_KEYS = [re.compile(pattern, re.S) for pattern in (
    r"-----BEGIN [A-Z ]*PRIVATE KEY( BLOCK)?-----.*?(-----END [A-Z ]*PRIVATE KEY( BLOCK)?-----|\Z)",
    r"(?<![A-Za-z0-9])(?:sk|rk|pk)[-_][\w-]{20,}",  # OpenAI, Anthropic, Stripe
    r"(?<![A-Za-z0-9])(?:hf_\w{20,}|npm_\w{20,}|github_pat_\w{20,}|AIza[\w-]{30,})",
    r"(?<![A-Za-z0-9])eyJ[\w=-]{1,4096}+\.[\w=-]+(?:\.[\w.+/=-]*)?",  # JSON web tokens; unbounded, -eyJ-eyJ is slow
    r"(?i:\bpassw(?:or)?d|\bpwd|\bpassphrase)(?!\D{0,9}\d+(?:\s*[*^]\s*\d+)+(?:\s*=|[\s.]|$))"
    r"(?:\s+is)?\s{0,3}[:=]?\s{0,3}[\"']?(?=[^\s\"']{0,64}[\d!@#$%&*])"
    r"[^\s\"',;()]{6,}",
    r"\b(?i:bearer)\s+[\w.~+/-]{16,}=*",
    r"(?i:api[_-]?key|(?:access|secret)[_-]?key|secret|token|passw(?:or)?d|pwd)[\"']?\s{0,3}[:=]\s{0,3}[\"']?"
    r"(?=[^\s\"']{0,64}[A-Za-z])(?=[^\s\"']{0,64}\d)[^\s\"',;()]{12,}",
)]
EMAIL = re.compile(r"(?<![\w.+%&'-])[\w.+%&'-]+@[\w-]+(?:\.[\w-]+)*\.[^\W\d_][\w-]+")
# IBANs and cards are looked for ahead, (?=...), since a true one may begin inside what only looks like one
IBAN = re.compile(r"(?<![A-Za-z0-9])(?=([A-Za-z]{2}\d{2}(?:[ -]?[A-Za-z0-9]){11,30}))")
CARDS = [re.compile(rf"(?<!\d)(?<!\d[.,])(?=({digits})(?!\d|[.,]\d))") for digits in (
    r"(?:\d{4}[ -]?){4}\d{3}", r"(?:\d{4}[ -]?){3}\d{4}", r"\d{4}[ -]?\d{6}[ -]?\d{4,5}", r"\d{13}")]
ISSUER = re.compile(r"4|5[1-5]|2[2-7]|3[04-9]|6[0245]")
IPV6 = re.compile(r"(?<![\w:.])[0-9A-Fa-f:]{3,39}(?:(?:\.\d{1,3}){3})?(?![\w:])")
IPV4 = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?!\w|\.\d)")
NUMBERING = re.compile(r"(?:version|release|section|chapter|clause|figure|table|§|\bv\.?)\s*$", re.I)
SEVEN_DIGITS = re.compile(r"\d(?:[^\w,=*+<>$%:;?!\"'\n]{0,4}\d){6}")
PHONE_CUE = re.compile(r"\b(?:(?:tele)?phone|telefon|tel|mobile|cell|fax|whatsapp|call|dial|ring|text)\b[^\d+(\n]{0,15}"
                       r"(\+?\(?\d[\d ()./-]{7,18}\d)(?!\d|\s*=)", re.I)
NO_PHONE = re.compile(r"^[1-9].* - .* - |^[1-9].* / .* / |\d/\d+/\d|\b\d{4}-\d\d-\d\d\b")  # a sum, a date
IN_PAIRS = re.compile(r"\d\d(?:[ .]\d\d){3}")


@functools.cache
def key_patterns() -> list[re.Pattern]:
    parts = (name.split(".") for name in SECRETS)
    found = [getattr(need(f"detect_secrets.plugins.{module}", "detect-secrets"), name) for module, name in parts]
    return MORE_KEYS + [pattern for plugin in found for pattern in plugin.denylist]


def iban_length(text: str) -> int:
    """How many characters from the start of a text are a valid IBAN (form of its country, check digits); 0: none."""
    iban = need("stdnum.iban", "python-stdnum")
    ends = [match.end() for match in re.finditer(r"[A-Za-z0-9]+", text) if match.end() > 14]  # no country has less
    return next((end for end in reversed(ends) if iban.is_valid(text[:end], check_country=False)), 0)


def is_card(text: str) -> bool:
    number = re.sub(r"\D", "", text)
    return bool(ISSUER.match(number)) and need("stdnum.luhn", "python-stdnum").is_valid(number)


def is_ip(text: str, before: str = "") -> bool:
    try:
        version = ipaddress.ip_address(text).version
    except ValueError:
        return False
    if version == 4:
        return not NUMBERING.search(before)
    groups = text.split(":")  # a ratio 1:2:3:4:5:6:7:8 or a::b of a program is none
    return sum(map(len, groups)) > 4 and ("::" in text or max(map(len, groups)) > 2)


def phone_spans(text: str) -> list[tuple[int, int]]:
    """Begin and end of the phone numbers in a text: with a country code, written in groups, or after such as "call"."""
    phonenumbers = need("phonenumbers", "phonenumbers")
    if not SEVEN_DIGITS.search(text):  # there is no shorter one, and the search for one is slow
        return []
    spans = [match.span(1) for match in PHONE_CUE.finditer(text)
             if (sum(map(str.isdigit, match[1])) > 8 or IN_PAIRS.fullmatch(match[1])) and not NO_PHONE.search(match[1])]
    dialled = re.sub(r"(?<![\w.,])00(?=[1-9]\d)", " +", text)  # 0049 30 ... is +49 30 ...; of the same length
    for match in phonenumbers.PhoneNumberMatcher(dialled, REGION, phonenumbers.Leniency.STRICT_GROUPING,
                                                 max_tries=len(text) + 1):
        is_sum = match.raw_string.isdigit() or dialled[match.end : match.end + 2].strip()[:1] == "="  # 900-300-2000 =
        if not is_sum or match.raw_string.startswith("+"):
            spans.append((match.start - (text[match.start] == "0" and dialled[match.start] == "+"), match.end))
    return spans


def redact(text: str) -> tuple[str, int]:
    """(text with personal data replaced by [KEY], [EMAIL], [IBAN], [CARD], [IP] or [PHONE], how many were).

    They are searched for in this order. Keys are found by the patterns of detect-secrets and MORE_KEYS; IBANs and cards
    must have right check digits, IP addresses and phone numbers must be valid by the libraries ipaddress and
    phonenumbers. Where nothing is found the text comes back as it was given.
    """
    count, given, text = 0, text, text.translate(WIDE)

    def cut(kind, text, spans):
        nonlocal count
        out, at = [], 0
        for begin, end in sorted(spans):
            if begin >= at:
                out += [text[at:begin], f"[{kind}]"]
                count += 1
            at = max(at, end)
        return "".join([*out, text[at:]])

    for pattern in key_patterns():
        text = cut("KEY", text, (m.span() for m in pattern.finditer(text)))
    text = cut("EMAIL", text, (m.span() for m in EMAIL.finditer(text)))
    ibans = ((m.start(), m.start() + iban_length(m[1])) for m in IBAN.finditer(text))
    text = cut("IBAN", text, (span for span in ibans if span[0] < span[1]))
    for pattern in CARDS:
        text = cut("CARD", text, (m.span(1) for m in pattern.finditer(text) if is_card(m[1])))
    for pattern in (IPV6, IPV4):
        found = ((m, m[0].rstrip(":") if m[0][-2:] != "::" else m[0]) for m in pattern.finditer(text))
        text = cut("IP", text, [(m.start(), m.start() + len(address)) for m, address in found
                                if is_ip(address, text[max(0, m.start() - 12) : m.start()])])
    text = cut("PHONE", text, phone_spans(text))
    return text if count else given, count
