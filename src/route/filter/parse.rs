//! The text of a filter as an expression: a recursive descent with a limit on its depth. Pure.
//!
//! ```text
//! or      = and { ("or" | "||") and }
//! and     = not { ("and" | "&&") not }
//! not     = ("not" | "!") not | "(" or ")" | test
//! test    = name [ compare literal | [ "not" ] "in" "(" literal { "," literal } ")"
//!                | "is" [ "not" ] "null" ]
//! name    = word | "quoted" | headers.word | headers."quoted"
//! literal = 'text' | number | true | false
//! ```

use super::{Comparison, Expression, Filter, Literal, Name};
use crate::error::{Error, Result};

/// Characters of an expression.
const LENGTH_MAX: usize = 10_000;
/// Parentheses and negations inside each other.
const DEPTH_MAX: usize = 50;

#[derive(Debug, Clone, PartialEq)]
enum Token {
    /// A word that is not in quotes.
    Word(String),
    /// In double quotes.
    Quoted(String),
    /// In single quotes.
    Text(String),
    Number(String),
    Sign(&'static str),
    End,
}

const SIGNS: [&str; 15] =
    ["==", "!=", "<>", "<=", ">=", "&&", "||", "=", "<", ">", "!", "(", ")", ",", "."];

impl Filter {
    /// Reads an expression.
    ///
    /// # Errors
    /// [`crate::error::Kind::Config`] with the place of the mistake.
    pub fn parse(text: &str) -> Result<Self> {
        if text.len() > LENGTH_MAX {
            let text = format!("the filter has {} bytes, at most {LENGTH_MAX}", text.len());
            return Err(Error::config(text));
        }
        let mut parser = Parser { text, at: 0, begin: 0, token: Token::End, names: Vec::new() };
        parser.advance()?;
        let root = parser.or(0)?;
        if parser.token != Token::End {
            return Err(parser.expected("\"and\", \"or\" or the end"));
        }
        Ok(Self { text: text.to_owned(), names: parser.names, root })
    }
}

struct Parser<'t> {
    text: &'t str,
    /// Where the next token begins, in bytes, and where the current one began.
    at: usize,
    begin: usize,
    token: Token,
    names: Vec<Name>,
}

impl Parser<'_> {
    fn or(&mut self, depth: usize) -> Result<Expression> {
        let mut parts = vec![self.and(depth)?];
        while self.takes("or", "||")? {
            parts.push(self.and(depth)?);
        }
        Ok(if parts.len() == 1 { parts.remove(0) } else { Expression::Or(parts) })
    }

    fn and(&mut self, depth: usize) -> Result<Expression> {
        let mut parts = vec![self.not(depth)?];
        while self.takes("and", "&&")? {
            parts.push(self.not(depth)?);
        }
        Ok(if parts.len() == 1 { parts.remove(0) } else { Expression::And(parts) })
    }

    fn not(&mut self, depth: usize) -> Result<Expression> {
        if depth >= DEPTH_MAX {
            return Err(self.wrong(&format!("more than {DEPTH_MAX} levels")));
        }
        if self.takes("not", "!")? {
            return Ok(Expression::Not(Box::new(self.not(depth + 1)?)));
        }
        if self.sign("(")? {
            let inner = self.or(depth + 1)?;
            return if self.sign(")")? { Ok(inner) } else { Err(self.expected("\")\"")) };
        }
        self.test()
    }

    fn test(&mut self) -> Result<Expression> {
        let name = self.name()?;
        for (sign, comparison) in [
            ("=", Comparison::Equal),
            ("==", Comparison::Equal),
            ("!=", Comparison::NotEqual),
            ("<>", Comparison::NotEqual),
            ("<", Comparison::Less),
            ("<=", Comparison::LessOrEqual),
            (">", Comparison::Greater),
            (">=", Comparison::GreaterOrEqual),
        ] {
            if self.sign(sign)? {
                return Ok(Expression::Compare(name, comparison, self.literal()?));
            }
        }
        if self.word("is")? {
            let not = self.word("not")?;
            if !self.word("null")? {
                return Err(self.expected("\"null\""));
            }
            let test = Expression::IsNull(name);
            return Ok(if not { Expression::Not(Box::new(test)) } else { test });
        }
        let not = self.word("not")?;
        if self.word("in")? {
            let test = Expression::In(name, self.list()?);
            return Ok(if not { Expression::Not(Box::new(test)) } else { test });
        }
        if not { Err(self.expected("\"in\"")) } else { Ok(Expression::IsTrue(name)) }
    }

    fn name(&mut self) -> Result<usize> {
        let name = match self.token.clone() {
            Token::Word(word) if is_reserved(&word) => return Err(self.expected("a name")),
            Token::Word(word) => Name::Word(word),
            Token::Quoted(name) => Name::Quoted(name),
            Token::Text(_) => {
                return Err(self.expected("a name; a value stands on the right of a comparison"));
            }
            Token::Number(_) | Token::Sign(_) | Token::End => return Err(self.expected("a name")),
        };
        self.advance()?;
        let name = if name == Name::Word("headers".into()) && self.sign(".")? {
            let header = match self.token.clone() {
                Token::Word(_) if self.text[self.at..].starts_with(['-', '.']) => {
                    let is_part = |c: char| c.is_alphanumeric() || "_-.$".contains(c);
                    let rest = &self.text[self.begin..];
                    let name = &rest[..rest.find(|c| !is_part(c)).unwrap_or(rest.len())];
                    let what = format!("{name} must be in double quotes: headers.\"{name}\"");
                    return Err(self.wrong(&what));
                }
                Token::Word(header) | Token::Quoted(header) => header,
                _ => return Err(self.expected("the name of a header")),
            };
            self.advance()?;
            Name::Header(header)
        } else {
            name
        };
        let known = self.names.iter().position(|known| *known == name);
        Ok(known.unwrap_or_else(|| {
            self.names.push(name);
            self.names.len() - 1
        }))
    }

    fn list(&mut self) -> Result<Vec<Literal>> {
        if !self.sign("(")? {
            return Err(self.expected("\"(\""));
        }
        let mut list = vec![self.literal()?];
        while self.sign(",")? {
            list.push(self.literal()?);
        }
        if self.sign(")")? { Ok(list) } else { Err(self.expected("\",\" or \")\"")) }
    }

    fn literal(&mut self) -> Result<Literal> {
        let literal = match self.token.clone() {
            Token::Text(text) => Literal::Text(text),
            Token::Number(number) => Literal::Number(number),
            Token::Word(word) if word.eq_ignore_ascii_case("true") => Literal::Bool(true),
            Token::Word(word) if word.eq_ignore_ascii_case("false") => Literal::Bool(false),
            Token::Word(word) if word.eq_ignore_ascii_case("null") => {
                return Err(self.expected("a value; a null is tested with \"is null\""));
            }
            Token::Word(_) | Token::Quoted(_) | Token::Sign(_) | Token::End => {
                return Err(self.expected("a value: 'text', a number, true or false"));
            }
        };
        self.advance()?;
        Ok(literal)
    }

    fn takes(&mut self, word: &str, sign: &str) -> Result<bool> {
        Ok(self.word(word)? || self.sign(sign)?)
    }

    fn word(&mut self, wanted: &str) -> Result<bool> {
        let is_it = matches!(&self.token, Token::Word(word) if word.eq_ignore_ascii_case(wanted));
        if is_it {
            self.advance()?;
        }
        Ok(is_it)
    }

    fn sign(&mut self, wanted: &str) -> Result<bool> {
        let is_it = matches!(&self.token, Token::Sign(sign) if *sign == wanted);
        if is_it {
            self.advance()?;
        }
        Ok(is_it)
    }

    /// Reads the next token.
    fn advance(&mut self) -> Result<()> {
        let rest = &self.text[self.at..];
        let trimmed = rest.trim_start();
        self.begin = self.at + rest.len() - trimmed.len();
        let mut characters = trimmed.chars();
        let (token, length) = match characters.next() {
            None => (Token::End, 0),
            Some(quote @ ('\'' | '"')) => self.quoted(trimmed, quote)?,
            Some(first) if first.is_ascii_digit() || first == '-' => {
                let is_part = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '+' | '-');
                let end = trimmed[1..].find(|c| !is_part(c)).map_or(trimmed.len(), |end| end + 1);
                let number = &trimmed[..end];
                if super::decimal::compare(number, "0").is_none() {
                    return Err(self.wrong(&format!("{number:?} is not a number")));
                }
                (Token::Number(number.to_owned()), end)
            }
            Some(first) if first.is_alphabetic() || first == '_' => {
                let is_part = |c: char| c.is_alphanumeric() || matches!(c, '_' | '$');
                let end = trimmed.find(|c| !is_part(c)).unwrap_or(trimmed.len());
                (Token::Word(trimmed[..end].to_owned()), end)
            }
            Some(other) => match SIGNS.iter().find(|sign| trimmed.starts_with(**sign)) {
                Some(sign) => (Token::Sign(sign), sign.len()),
                None => return Err(self.wrong(&format!("{other:?} means nothing here"))),
            },
        };
        (self.token, self.at) = (token, self.begin + length);
        Ok(())
    }

    /// A text in quotes, in which a doubled quote stands for one; with its length in bytes.
    fn quoted(&self, text: &str, quote: char) -> Result<(Token, usize)> {
        let (mut out, mut at) = (String::new(), 1);
        loop {
            let Some(end) = text[at..].find(quote) else {
                return Err(self.wrong(&format!("a {quote} without its end")));
            };
            out.push_str(&text[at..at + end]);
            at += end + 1;
            if !text[at..].starts_with(quote) {
                break;
            }
            out.push(quote);
            at += 1;
        }
        Ok((if quote == '"' { Token::Quoted(out) } else { Token::Text(out) }, at))
    }

    fn expected(&self, what: &str) -> Error {
        self.wrong(&format!("expected {what}"))
    }

    /// An error at the current token.
    fn wrong(&self, what: &str) -> Error {
        let (before, rest) = self.text.split_at(self.begin);
        let column = before.chars().count() + 1;
        let place = match rest.is_empty() {
            true => "at the end".to_owned(),
            false => {
                format!("at character {column}, {:?}", rest.chars().take(20).collect::<String>())
            }
        };
        Error::config(format!("filter {:?}: {what} {place}", self.text))
    }
}

fn is_reserved(word: &str) -> bool {
    let reserved = ["and", "or", "not", "in", "is", "null", "true", "false"];
    reserved.iter().any(|reserved| word.eq_ignore_ascii_case(reserved))
}
