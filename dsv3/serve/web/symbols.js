// TeX names -> characters, for maths.js. Tables only.

const table = (text) => {
  const parts = text.trim().split(/\s+/);
  return new Map(parts.flatMap((name, k) => (k % 2 ? [] : [[name, parts[k + 1]]])));
};

// Identifiers; lower-case letters come out italic, capitals upright, as TeX has them.
export const LETTERS = table(`
  alpha α beta β gamma γ delta δ epsilon ϵ varepsilon ε zeta ζ eta η theta θ vartheta ϑ iota ι kappa κ lambda λ mu μ
  nu ν xi ξ omicron ο pi π varpi ϖ rho ρ varrho ϱ sigma σ varsigma ς tau τ upsilon υ phi ϕ varphi φ chi χ psi ψ
  omega ω Gamma Γ Delta Δ Theta Θ Lambda Λ Xi Ξ Pi Π Sigma Σ Upsilon Υ Phi Φ Psi Ψ Omega Ω infty ∞ partial ∂ nabla ∇
  hbar ℏ ell ℓ Re ℜ Im ℑ aleph ℵ wp ℘ emptyset ∅ varnothing ∅ imath ı jmath ȷ top ⊤ bot ⊥ angle ∠ degree ° prime ′
  hslash ℏ complement ∁ dagger † ddagger ‡ checkmark ✓ square □ Box □ blacksquare ■ qed ∎ triangle △ diamond ⋄
  clubsuit ♣ heartsuit ♡ spadesuit ♠ ldots … dots … cdots ⋯ vdots ⋮ ddots ⋱ dotsc … dotsb ⋯
`);

export const OPERATORS = table(`
  pm ± mp ∓ times × div ÷ cdot ⋅ ast ∗ star ⋆ circ ∘ bullet ∙ oplus ⊕ ominus ⊖ otimes ⊗ oslash ⊘ odot ⊙ wedge ∧
  land ∧ vee ∨ lor ∨ cap ∩ cup ∪ setminus ∖ sqcap ⊓ sqcup ⊔ uplus ⊎ amalg ⨿ le ≤ leq ≤ leqslant ⩽ ge ≥ geq ≥
  geqslant ⩾ ne ≠ neq ≠ ll ≪ gg ≫ approx ≈ equiv ≡ cong ≅ sim ∼ simeq ≃ asymp ≍ propto ∝ doteq ≐ triangleq ≜
  coloneqq ≔ in ∈ notin ∉ ni ∋ subset ⊂ supset ⊃ subseteq ⊆ supseteq ⊇ subsetneq ⊊ supsetneq ⊋ prec ≺ succ ≻
  preceq ⪯ succeq ⪰ perp ⟂ parallel ∥ mid ∣ nmid ∤ vdash ⊢ dashv ⊣ models ⊨ forall ∀ exists ∃ nexists ∄ neg ¬ lnot ¬
  therefore ∴ because ∵ to → rightarrow → leftarrow ← gets ← leftrightarrow ↔ Rightarrow ⇒ Leftarrow ⇐
  Leftrightarrow ⇔ implies ⟹ impliedby ⟸ iff ⟺ mapsto ↦ longrightarrow ⟶ longleftarrow ⟵ Longrightarrow ⟹
  Longleftarrow ⟸ Longleftrightarrow ⟺ longmapsto ⟼ uparrow ↑ downarrow ↓ updownarrow ↕ Uparrow ⇑ Downarrow ⇓
  nearrow ↗ searrow ↘ hookrightarrow ↪ hookleftarrow ↩ rightharpoonup ⇀ rightleftharpoons ⇌ leadsto ⇝ colon :
  lVert ‖ rVert ‖ lvert | rvert | backslash ∖ gtrsim ≳ lesssim ≲
`);

// Big operators; those in NO_LIMITS keep their bounds at the side.
export const BIG = table(`
  sum ∑ prod ∏ coprod ∐ int ∫ iint ∬ iiint ∭ oint ∮ bigcap ⋂ bigcup ⋃ bigvee ⋁ bigwedge ⋀ bigoplus ⨁ bigotimes ⨂
  bigodot ⨀ biguplus ⨄ bigsqcup ⨆
`);
export const NO_LIMITS = new Set(["int", "iint", "iiint", "oint"]);

export const FUNCTIONS = new Set(
  `arccos arcsin arctan arg cos cosh cot coth csc deg dim exp hom ker lg ln log sec sin sinh tan tanh softmax`.split(
    " ",
  ),
);
export const LIMIT_FUNCTIONS = new Set("lim limsup liminf max min sup inf det gcd Pr argmax argmin".split(" "));

export const DELIMITERS = table(`
  { { } } lbrace { rbrace } lbrack [ rbrack ] langle ⟨ rangle ⟩ lfloor ⌊ rfloor ⌋ lceil ⌈ rceil ⌉ vert | Vert ‖ | ‖
  lvert | rvert | lVert ‖ rVert ‖ lgroup ⟮ rgroup ⟯ uparrow ↑ downarrow ↓ backslash ∖
`);

export const ACCENTS = table(`
  hat ^ widehat ^ bar ‾ overline ‾ tilde ~ widetilde ~ vec → overrightarrow → overleftarrow ← dot ˙ ddot ¨ dddot ⃛
  check ˇ breve ˘ acute ´ grave \` mathring ˚ overbrace ⏞
`);
export const STRETCHED = new Set(["widehat", "overline", "widetilde", "overrightarrow", "overleftarrow", "overbrace"]);

// Widths in em of spaces.
export const SPACES = new Map([
  [",", 0.1667],
  [":", 0.2222],
  [">", 0.2222],
  [";", 0.2778],
  ["!", -0.1667],
  [" ", 0.25],
  ["~", 0.25],
  ["quad", 1],
  ["qquad", 2],
  ["enspace", 0.5],
  ["thinspace", 0.1667],
  ["medspace", 0.2222],
  ["thickspace", 0.2778],
]);

export const MATRICES = new Map([
  ["matrix", ["", ""]],
  ["pmatrix", ["(", ")"]],
  ["bmatrix", ["[", "]"]],
  ["Bmatrix", ["{", "}"]],
  ["vmatrix", ["|", "|"]],
  ["Vmatrix", ["‖", "‖"]],
  ["smallmatrix", ["", ""]],
  ["cases", ["{", ""]],
  ["rcases", ["", "}"]],
  ["array", ["", ""]],
  ["aligned", ["", ""]],
  ["align", ["", ""]],
  ["split", ["", ""]],
  ["gathered", ["", ""]],
  ["gather", ["", ""]],
  ["equation", ["", ""]],
  ["alignedat", ["", ""]],
  ["eqnarray", ["", ""]],
  ["substack", ["", ""]],
]);

// Alphabets of Unicode: where capital A, small a and digit 0 stand, and the letters that stand elsewhere.
const ALPHABETS = {
  mathbf: [0x1d400, 0x1d41a, 0x1d7ce, ""],
  mathit: [0x1d434, 0x1d44e, 0, "hℎ"],
  boldsymbol: [0x1d468, 0x1d482, 0x1d7ce, ""],
  mathcal: [0x1d49c, 0x1d4b6, 0, "BℬEℰFℱHℋIℐLℒMℳRℛeℯgℊoℴ"],
  mathfrak: [0x1d504, 0x1d51e, 0, "CℭHℌIℑRℜZℨ"],
  mathbb: [0x1d538, 0x1d552, 0x1d7d8, "CℂHℍNℕPℙQℚRℝZℤ"],
  mathsf: [0x1d5a0, 0x1d5ba, 0x1d7e2, ""],
  mathtt: [0x1d670, 0x1d68a, 0x1d7f6, ""],
};
const SAME = { bm: "boldsymbol", mathscr: "mathcal", mathds: "mathbb", bf: "mathbf", textbf: "mathbf" };

export const isAlphabet = (name) => Object.hasOwn(ALPHABETS, name) || Object.hasOwn(SAME, name);

// A letter or digit in an alphabet; other characters are themselves.
export function styled(name, char) {
  const [capital, small, digit, elsewhere] = ALPHABETS[SAME[name] ?? name];
  const found = [...elsewhere].findIndex((c, k, all) => k % 2 === 0 && c === char && all[k + 1]);
  if (found >= 0) return [...elsewhere][found + 1];
  const code = char.codePointAt(0);
  if (char >= "A" && char <= "Z") return String.fromCodePoint(capital + code - 65);
  if (char >= "a" && char <= "z") return String.fromCodePoint(small + code - 97);
  if (char >= "0" && char <= "9" && digit) return String.fromCodePoint(digit + code - 48);
  return char;
}
