"""Texts in many languages and scripts, code, odd characters, and literals of tokens."""

LANGUAGES = (
    "The quick brown fox jumps over the lazy dog.",
    "Der schnelle Fuchs, über Größe und Maß hinaus.",
    "Un été à la plage, où l’œuf a été cuit.",
    "El niño comió una piña; ¿verdad que sí?",
    "O coração não é só de papelão.",
    "Perché l'università è così lontana?",
    "De kat zat op de mat, zei zij.",
    "Zażółć gęślą jaźń.",
    "Příliš žluťoučký kůň úpěl ďábelské ódy.",
    "Съешь же ещё этих мягких французских булок.",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "İstanbul'da çığlık atan şoför öğrenci.",
    "نص حكيم له سر قاطع وذو شأن عظيم.",
    "דג סקרן שט בים מאוכזב.",
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा।",
    "আমি কাচ খেতে পারি, তাতে আমার কোনো ক্ষতি হয় না।",
    "நான் கண்ணாடி சாப்பிடுவேன்.",
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า",
    "色は匂へど散りぬるを、ア イ ウ ABC１２３。",
    "天地玄黄，宇宙洪荒。日月盈昃，辰宿列张。",
    "다람쥐 헌 쳇바퀴에 타고파.",
    "Tôi có thể ăn thủy tinh mà không hại gì.",
)
OTHERS = (
    "def f(x):\n    return {'a': x ** 2}  # ünï\n\n\nprint(f(3.14e-10))\n",
    "<table><tr><td>1</td></tr></table>\n<h1>a</h1><code>x</code>",
    "🙂👩\u200d👩\u200d👧🇩🇪👍🏽 e\u0301 \0 \ufeff \U0010ffff \ufffd",
    " a  b   c    d\n\n\n\n\t\t\te \r\n f\u00a0g\u2028h",
    "",
    " ",
    "1234567890 0x1F 3,14 ٣ ２",
)
LITERALS = (
    "<bos><start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\n",
    "a<eos>b<pad><unk><mask> <unused0><unused12>x[multimodal]",
    "<start_of_turn><start_of_turn<end_of_turn>><",
)
TEXTS = (*LANGUAGES, *OTHERS, *LITERALS)
